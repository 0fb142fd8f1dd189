"""From the user's picture to the frames that the networks work on, and back."""
