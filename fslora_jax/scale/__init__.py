"""How time, memory and exchanges of a round grow with one thing at a time: points in processes of their own."""
