"""A model before it is trained: its files, how it is loaded and in which format, how it attends, what it will cost."""
