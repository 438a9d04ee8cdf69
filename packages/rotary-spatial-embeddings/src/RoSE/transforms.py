"""Learnable spacing transforms (see ``make_spacing_transform``)."""
