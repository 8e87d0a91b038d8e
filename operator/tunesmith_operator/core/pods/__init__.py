"""Tunesmith's pods, whichever object owns them: their spec, what is seen of them, why one doesn't start or crashed."""
