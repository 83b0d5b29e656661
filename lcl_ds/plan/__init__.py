"""Say before a GPU is rented what a run needs: memory, time, communication, money.

Nothing here needs a GPU, the data or the memory of the model.
"""
