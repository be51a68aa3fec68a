"""Reading webdataset tars: where each member lies, and the images in them."""
