"""What validate and compare measure with: the bench, its yardsticks, and the figures as values."""
