"""What runs and studies have shown: a table of runs, and a page of figures.

run folder or study folder -> measurements -> figures (PNG) and tables -> one HTML file
"""
