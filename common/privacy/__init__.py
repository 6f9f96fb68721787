"""Privacy: units and relations, mechanisms, plans and accounting."""
