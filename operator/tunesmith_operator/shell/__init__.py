"""The process that kopf runs, what it watches, who leads, its settings and logs. Nothing is decided here."""
