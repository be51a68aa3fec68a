"""The losses as one torch operator: from pairs into flat lists, softmax or sigmoid over the tiles, and back."""
