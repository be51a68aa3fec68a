"""The layout of Apple's DataCompDR: what two teachers say of augmented crops and of captions, in webdataset tars.

Members of a sample: `npz` or `pth.gz` with the embeddings (`embeddings.py`), `paug.json` with the crops of the image
(`crops.py`), `syn.json` with synthetic captions (`caption_rows.py`); in some tars also its image, `txt` and `json`.
Source: apple/ml-mobileclip-dr (`datasetio.py`, `dr/transforms.py`), apple/ml-mobileclip (`training/`,
`hf_dataset_example.py`), and the cards of the data sets.
"""
