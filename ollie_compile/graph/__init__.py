"""The way of a graph of torch.compile: its parameters are held, its operators found, planned and replaced.

The passes run inside Inductor; the gate times whole graphs around it. `plan` decides which
program replaces an operator; this folder finds operators and puts programs into the graph.
"""
