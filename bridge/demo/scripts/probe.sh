# Nothing to do: that this runs at all is the answer.
