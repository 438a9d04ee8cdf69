"""Points at fractional places of the grid of groups, in Triton kernels: one form and its derivatives.

``f = sum_ip c_ip <z(x_ip), r_i>`` as in :mod:`...native.points`. One kernel computes whichever of its derivatives are
wanted: those by c are products of keys with queries at points, those by r are values that tokens see, those by z are
sums that groups receive. So every pass and every gradient of one is a launch of it.

A program owns some tokens and keeps no vector for a point. What groups receive from tokens that may look anywhere is
added in memory, in the order in which programs come to it: equal calls differ in their last bits, and deterministic
algorithms are the formulas'.
"""
