"""open_clip's models: loading them, and their image and text towers as encoders."""
