"""The similarity matrix in tiles: what a back end does, what tiles leave behind, and the loop over them."""
