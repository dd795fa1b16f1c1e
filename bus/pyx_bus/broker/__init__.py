"""The broker, ``pyx-busd``: routes calls, keeps the journal of events, serves subscriptions. It decides (``router``, ``events``,
``subscriptions``, ``roles``, ``filters``) without sockets; ``server`` does the I/O. It never looks into a call or its answer."""
