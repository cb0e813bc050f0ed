"""The control socket: what an operator sees of a running bridge, and what can be asked of it.

HTTP on a unix socket of its own, one per bridge. The data path knows nothing of it: everything is
read from the live objects when it is asked for, and every action goes through the same doors that
signals and timers use.

    places              where the sockets are, and how one is made
    live                the objects of one running disk, and the only place that looks into them
    view                what they say, as plain values: the answer to `GET /status`
    metrics             the same for Prometheus
    sampler             latency of sampled requests, and in which stage the time goes
    traffic             requests and bytes by operation
    watch               slow requests, the rate of write-out: while there is something to watch
    actions             flush, warm, resize, … : what can be asked
    routes, openapi     which request leads where, and the description of all of them
    fields              the body of a request, declared once
    page                the live page, `page.html`
    exporter, merge     all bridges of a host on one TCP address: `nbd-bridge exporter`
    http                one connection: h11 and its limits
    service             all of it joined: what `serve` starts
    client              the other end, for the commands
"""
