"""The records everything in noid talks about. Frozen, keyword-only, without behaviour beyond derived values.

Units are in the names; times are aware UTC; identifiers are strings. A record that is stored or sent has exactly the
fields its table or JSON object has. They are in modules by what they are about: a command that is over in a tenth of a
second waits for none it does not use.
"""
