"""What the extraction methods find in the bundled models, beside their controls: `python -m lab.replications [NAME]`.

Each row is a recipe run as a user would run it, on a committed data set; its report is written as JSON.
"""
