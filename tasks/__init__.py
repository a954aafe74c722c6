"""What runs on the rented (or own) machine: labels, training, evaluation, export, and the supervisor."""
