"""The embedded miniature: a portrait world drawn by our own code, and a FLUX-shaped model of a few megabytes that learns it.

Nothing outside this package imports it; what the app needs of it are the files under `assets/`.
"""
