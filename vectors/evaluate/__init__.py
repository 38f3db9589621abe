"""What the text was: graders of whole answers."""
