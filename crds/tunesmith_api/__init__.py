"""The language of Tunesmith: the API types and the contracts between operator and pods.

Floor 0 of the house: pydantic and the standard library only. The operator, the trainer, the server and the CRD
generator all import it, and they meet nowhere else.
"""

__version__ = "0.1.0"
