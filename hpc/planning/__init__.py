"""What `trireme plan` is made of: costs, measured and modelled."""
