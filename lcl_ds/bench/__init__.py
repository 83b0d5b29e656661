"""Speed, memory and accuracy of the losses of ``lcl_kernels`` beside those of other projects, on this machine.

``python -m lcl_ds.bench losses`` and ``python -m lcl_ds.bench contrastive``; see ``--help``.
"""
