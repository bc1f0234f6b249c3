"""Diagnostics: the catalogue of codes and the printers.

`porter.diagnostics.render.render(diagnostics, format)` prints; `porter.diagnostics.catalogue.entry(code)` explains.
"""
