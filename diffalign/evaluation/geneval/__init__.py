"""GenEval (Ghosh, Hajishirzi, Schmidt, arXiv 2310.11513; official code djghosh13/geneval, MIT): does a picture hold
the objects, counts, colours and places that its caption asks for?"""
