// A daemon that speaks Kubo's RPC, offline, on one loopback port: js-ipfs's core and HTTP API.
// Usage: node daemon.mjs REPOSITORY.  Writes the port as its first line; ends when its standard input does.

// js-ipfs's dependencies want Node 22's Promise.withResolvers
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((yes, no) => { resolve = yes; reject = no })
  return { promise, resolve, reject }
}
const { create } = await import('ipfs-core')
const { HttpApi } = await import('ipfs-http-server')

const ipfs = await create({
  repo: process.argv[2],
  start: false, // no libp2p, no network
  silent: true,
  init: { algorithm: 'Ed25519', emptyRepo: true },
  config: {
    Addresses: { API: '/ip4/127.0.0.1/tcp/0', Gateway: '', Swarm: [], Delegates: [] },
    Bootstrap: [],
    Discovery: { MDNS: { Enabled: false }, webRTCStar: { Enabled: false } }
  }
})
const api = new HttpApi(ipfs)
await api.start()
console.log(api._apiServers[0].info.port)
process.stdin.on('end', () => process.exit(0)).resume()
