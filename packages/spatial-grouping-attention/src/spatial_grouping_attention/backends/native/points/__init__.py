"""Kernels for points at fractional places of the grid of groups: all are pieces of one form and its derivatives.

``f = sum_ip c_ip <z(x_ip), r_i>``, where every token i has a row r_i and points x_ip with a number c_ip, and z(x) is
interpolated between the rows z_j of the groups around x. Products of keys with queries at points are its derivatives by
c, values that tokens see those by r, sums that groups receive those by z. So whichever of them a pass computes, the
others are its gradients, and those of the places come along.

No vector is kept for a point: its corners are found again by every pass that needs them.
"""
