"""What the text was: graders of whole answers, and evaluations of a spec by them."""
