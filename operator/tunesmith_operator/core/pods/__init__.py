"""Pods of ours, whatever makes them: their spec, what is seen of them, why one does not start or has crashed."""
