"""Where data, models, training and evaluation meet."""
