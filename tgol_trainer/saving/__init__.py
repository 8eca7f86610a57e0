"""The road from a trained model to disk and Hub: files of a run, model card, pushes."""
