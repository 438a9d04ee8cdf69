"""Parts of ``train_segmentation.py`` and ``predict_segmentation.py``; nothing that is installed."""
