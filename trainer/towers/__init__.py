"""The main towers and the small heads between them and the third."""
