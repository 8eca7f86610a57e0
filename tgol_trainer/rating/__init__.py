"""The page of `tgol rate`: what is shown in which order, the server, and its pushes to the Hub."""
