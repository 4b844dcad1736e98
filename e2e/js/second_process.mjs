// Connects to a sandbox by its id from a process of its own: second_process.mjs SANDBOX_ID
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.connect(process.argv[2], { timeoutMs: 600_000 })
const note = await sandbox.files.read('note.txt')
const { stdout } = await sandbox.commands.run('echo $E2B_SANDBOX_ID', { timeoutMs: 120_000 })
await sandbox.files.write('answer.txt', `got ${note}`)
console.log(JSON.stringify({ note, id: stdout.trim(), running: await sandbox.isRunning() }))
