"""The parts of ``demos/app.py``: a file a tab, the offer of models and folders, what tabs share, and the safe defaults."""
