// A certified OpenID Connect provider (the npm package oidc-provider) on a loopback port, for tests.
//
// Reads one command a line and answers each with one line of JSON:
//   token ALG      a token for the audience, from the provider's own token endpoint
//   rotate         from now on the provider has new keys, on the same address
// The first line it prints, before any command, is {"issuer": …, "audience": …}.

import { createServer } from 'node:http'
import { createInterface } from 'node:readline'
import { generateKeyPairSync, randomUUID } from 'node:crypto'

import Provider from 'oidc-provider'

const AUDIENCE = 'urn:belljar:test'
const MAKE = {
  RS256: () => generateKeyPairSync('rsa', { modulusLength: 2048 }),
  PS256: () => generateKeyPairSync('rsa', { modulusLength: 2048 }),
  ES256: () => generateKeyPairSync('ec', { namedCurve: 'P-256' }),
  EdDSA: () => generateKeyPairSync('ed25519'),
}

function keys() {
  const key = (alg) => ({ ...MAKE[alg]().privateKey.export({ format: 'jwk' }), alg, use: 'sig', kid: randomUUID() })
  return { keys: Object.keys(MAKE).map(key) }
}

function provider(issuer) {
  return new Provider(issuer, {
    jwks: keys(),
    ttl: { ClientCredentials: 600 },
    clients: Object.keys(MAKE).map((alg) => ({
      client_id: `robot-${alg}`,
      client_secret: `secret-of-${alg}`,
      grant_types: ['client_credentials'],
      redirect_uris: [],
      response_types: [],
    })),
    features: {
      devInteractions: { enabled: false },
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: () => AUDIENCE,
        getResourceServerInfo: (_ctx, _resource, client) => ({
          scope: '',
          audience: AUDIENCE,
          accessTokenFormat: 'jwt',
          jwt: { sign: { alg: client.clientId.slice('robot-'.length) } },
        }),
      },
    },
  })
}

async function token(issuer, alg) {
  const basic = Buffer.from(`robot-${alg}:secret-of-${alg}`).toString('base64')
  const answer = await fetch(`${issuer}/token`, {
    method: 'POST',
    headers: { authorization: `Basic ${basic}`, 'content-type': 'application/x-www-form-urlencoded' },
    body: 'grant_type=client_credentials',
    signal: AbortSignal.timeout(10_000),
  })
  if (!answer.ok) throw new Error(`the token endpoint answered ${answer.status}: ${await answer.text()}`)
  return (await answer.json()).access_token
}

let current
const server = createServer((request, response) => current(request, response))
await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
const issuer = `http://127.0.0.1:${server.address().port}`
current = provider(issuer).callback()
console.log(JSON.stringify({ issuer, audience: AUDIENCE }))

for await (const line of createInterface({ input: process.stdin })) {
  const [command, alg] = line.split(' ')
  let said
  try {
    if (command === 'rotate') current = provider(issuer).callback()
    else if (command !== 'token') throw new Error(`unknown command ${command}`)
    said = command === 'token' ? { token: await token(issuer, alg) } : {}
  } catch (error) {
    said = { error: String(error) }
  }
  console.log(JSON.stringify(said))
}
server.closeAllConnections()
server.close()
