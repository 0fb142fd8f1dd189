"""From the user's picture to the frames the networks work on, and back."""
