"""Studies: the same recipe with some settings changed, over seeds and budgets, measured and put on one page."""
