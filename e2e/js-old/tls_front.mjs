// Makes a plain-HTTP server look like a public domain, for an SDK that knows nothing else: old
// releases go to `https://api.DOMAIN` and `https://PORT-ID.DOMAIN`. The domain may carry a port, so
// names below it are led here, unwrapped, and passed on with the Host header as the SDK wrote it.
// ../python/tls_front.py does the same by way of an HTTP proxy, which this release cannot use.
import { execFileSync, spawnSync } from 'node:child_process'
import dns from 'node:dns'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { connect } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import tls from 'node:tls'

import { setting } from '../js/checks.mjs'

const NAME = 'sandboxes.test'

/** Starts it: `{ domain, stop }`. */
export async function startFront() {
  const certificate = makeCertificate()
  leadNamesHere()
  // The certificate is a minute old and nobody's; who signed it is not what these checks are about.
  process.env.NODE_TLS_REJECT_UNAUTHORIZED = '0'
  const server = tls.createServer({ ...certificate, ALPNProtocols: ['http/1.1'] }, (near) => {
    const name = near.servername || ''
    const to = setting(name.startsWith('api.') ? 'E2B_API_URL' : 'E2B_SANDBOX_URL')
    const { hostname, port } = new URL(to)
    const far = connect(Number(port || 80), hostname)
    near.pipe(far).pipe(near)
    for (const [one, other] of [
      [near, far],
      [far, near],
    ]) {
      one.on('error', () => other.destroy())
      one.on('close', () => other.destroy())
    }
  })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  return { domain: `${NAME}:${server.address().port}`, stop: () => server.close() }
}

export function canMakeCertificates() {
  return spawnSync('openssl', ['version'], { stdio: 'ignore' }).status === 0
}

function makeCertificate() {
  const folder = mkdtempSync(join(tmpdir(), 'tls-front-'))
  const [keyFile, certFile] = ['key.pem', 'certificate.pem'].map((name) => join(folder, name))
  try {
    execFileSync(
      'openssl',
      [
        'req',
        '-x509',
        '-newkey',
        'rsa:2048',
        '-nodes',
        '-days',
        '1',
        '-subj',
        `/CN=${NAME}`,
      ].concat(
        ['-addext', `subjectAltName=DNS:${NAME},DNS:*.${NAME}`, '-keyout', keyFile],
        ['-out', certFile]
      ),
      { stdio: 'ignore', timeout: 60_000 }
    )
    return { key: readFileSync(keyFile), cert: readFileSync(certFile) }
  } finally {
    rmSync(folder, { recursive: true })
  }
}

function leadNamesHere() {
  const lookup = dns.lookup
  dns.lookup = (name, options, callback) => {
    if (!name.endsWith(`.${NAME}`)) return lookup(name, options, callback)
    const found = { address: '127.0.0.1', family: 4 }
    if (options.all) callback(null, [found])
    else callback(null, found.address, found.family)
  }
}
