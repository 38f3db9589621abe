"""What the extraction methods find in the bundled models, beside their controls: `python -m lab.replications [NAME]`.

One row a file. Each runs recipes as a user would run them, on committed data sets, measures what their own reports do
not hold, and is written as JSON, a picture and a section of docs/replications.md.
"""
