"""What devices and process groups need so that training is the same on all of them."""
