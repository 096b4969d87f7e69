"""Experience: text generation, enumerable text problems, Gymnasium environments, gridworlds."""
