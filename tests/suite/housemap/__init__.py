"""The house as one picture, drawn from the code: docs/images/house.svg.

`graph` reads rooms, floors and arrows from the imports, `layout` finds a place for each, `drawing` writes SVG.
`make generate` writes the picture and `make verify` compares it, both by `python -m suite.housemap`.
"""
