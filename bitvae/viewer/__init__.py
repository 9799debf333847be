"""The interactive viewer: see an image's bits scale by scale, and edit them."""

from bitvae.viewer.app import Viewer, serve, view

__all__ = ["Viewer", "serve", "view"]
