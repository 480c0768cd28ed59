// One call of the official client of the GitHub Actions cache; the last line printed is its result, as JSON.
//
//     node client.mjs MODULES save KEY PATH
//     node client.mjs MODULES restore KEY PATH [RESTORE_KEY...]
//     node client.mjs MODULES download URL FILE     in ranges, with the SDK of Azure, as it does from blobs of Azure

import path from 'node:path'
import { pathToFileURL } from 'node:url'

const [modules, what, ...rest] = process.argv.slice(2)
const load = (file) => import(pathToFileURL(path.join(modules, '@actions/cache/lib', file)).href)

async function call() {
  if (what === 'download') {
    const { downloadCacheStorageSDK } = await load('internal/downloadUtils.js')
    return downloadCacheStorageSDK(rest[0], rest[1], { downloadConcurrency: 8, timeoutInMs: 30000 })
  }
  const cache = await load('cache.js')
  const [key, folder, ...restoreKeys] = rest
  return what === 'save' ? cache.saveCache([folder], key) : cache.restoreCache([folder], key, restoreKeys)
}

const result = await call()
console.log(`\n${JSON.stringify(result ?? null)}`)
