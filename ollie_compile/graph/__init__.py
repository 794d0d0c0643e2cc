"""What happens to a graph of torch.compile: parameters are held, operators found, planned and replaced.

The passes run inside Inductor; the gate times whole graphs around it. Which program replaces an operator is
decided in `plan`; this folder knows where operators stand and how a program takes their place.
"""
