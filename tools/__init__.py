"""What people look through: the command line, the demo and its measurements, the page that shows a trace.

In: a model and a recipe, or a trace. Out: tables, files, pages. Nothing below this folder imports it;
`bf.viz` is its one name for a program.
"""
