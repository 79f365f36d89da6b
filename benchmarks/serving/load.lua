-- Posts one body, again and again. With a second argument, the numbers that each answer must hold, it looks at every
-- answer; that costs the generator time, so it is done while a server warms up. The sums are printed as JSON.

local threads = {}
wrong = 0

function setup(thread)
   table.insert(threads, thread)
end

local function slurp(path)
   local file = assert(io.open(path, "rb"))
   local text = file:read("*a")
   file:close()
   return text
end

local function numbers(text)
   local found = {}
   for word in string.gmatch(text, "[-+%d.eE]+") do
      table.insert(found, tonumber(word))
   end
   return found
end

local function same(one, other)
   if #one ~= #other then
      return false
   end
   for i = 1, #one do
      if not (math.abs(one[i] - other[i]) <= 1e-9 * math.max(1, math.abs(one[i]))) then
         return false
      end
   end
   return true
end

function init(args)
   wrk.method = "POST"
   wrk.body = slurp(args[1])
   wrk.headers["Content-Type"] = "application/json"
   wrk.headers["Accept"] = "application/json"
   if args[2] then
      local wanted = numbers(slurp(args[2]))
      local known = nil
      response = function(status, headers, body)
         if status ~= 200 then
            wrong = wrong + 1
         elseif body ~= known then
            if same(wanted, numbers(body)) then
               known = body
            else
               wrong = wrong + 1
            end
         end
      end
   end
end

function done(summary, latency, requests)
   local bad = 0
   for _, thread in ipairs(threads) do
      bad = bad + thread:get("wrong")
   end
   local errors = summary.errors
   io.write(string.format(
      '\nRESULT {"requests": %d, "us": %d, "bytes": %d, "not_200": %d, "socket": %d, "wrong": %d, "p50": %d, "p99": %d}\n',
      summary.requests, summary.duration, summary.bytes, errors.status,
      errors.connect + errors.read + errors.write + errors.timeout, bad,
      latency:percentile(50), latency:percentile(99)))
end
