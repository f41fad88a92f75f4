"""What moves with an infinitesimal step: vector-Jacobian products and what is measured by them."""
