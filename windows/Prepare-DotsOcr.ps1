<#
.SYNOPSIS
Prepares Windows for a dots.ocr server in a distribution of WSL2, and deploys the server there.

.DESCRIPTION
Checks NVIDIA's driver, updates WSL, installs a distribution if it is not there (and the drive has room for image and weights),
keeps it running (.wslconfig), enables systemd in it (/etc/wsl.conf), and starts it when you log on. Then it clones the repository
to /opt/dots-ocr-deploy in the distribution and runs 'make deploy' there as root. Your other settings stay as they are; the first
state of .wslconfig is kept beside it as .wslconfig.before-dots-ocr. Run the script again after each stop: it continues where it
was. docs/start/windows.md has the same steps by hand, and the way back. The file needs nothing else of the repository.

Run it as the user who will use WSL, in an ordinary window: only the first installation of WSL itself asks for an
administrator. With -WhatIf it only says what it would do.

.PARAMETER Repository
The address to clone from. Default: the environment variable DOTS_OCR_REPOSITORY, then the public address.

.PARAMETER NoDeploy
Only prepare Windows, and print the commands that deploy the server.

.PARAMETER Distribution
The distribution, by its name in 'wsl --list --online'.

.PARAMETER Memory
Main memory for WSL, such as 24GB. Default: what you have set, else half of what Windows has, but at least 12 GB.

.PARAMETER Swap
Swap space for WSL, such as 8GB. Default: what you have set, else 8 GB where WSL gets less than 16 GB.

.PARAMETER NoLogonTask
Do not start the distribution when you log on.

.EXAMPLE
powershell -ExecutionPolicy Bypass -File .\Prepare-DotsOcr.ps1 -WhatIf

.EXAMPLE
powershell -ExecutionPolicy Bypass -File .\Prepare-DotsOcr.ps1 -Memory 24GB -NoDeploy
#>
#Requires -Version 5.1
[CmdletBinding(SupportsShouldProcess = $true)]
param(
    [ValidatePattern('^[A-Za-z0-9._-]+$')]
    [string] $Distribution = 'Ubuntu-24.04',

    [ValidatePattern('^(\d+ ?(KB|MB|GB|TB)?)?$')]
    [string] $Memory = '',

    [ValidatePattern('^(\d+ ?(KB|MB|GB|TB)?)?$')]
    [string] $Swap = '',

    [string] $Repository = $env:DOTS_OCR_REPOSITORY,

    [switch] $NoLogonTask,

    [switch] $NoDeploy
)

Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

# The first branch with CUDA 13, and the first WSL whose source has instanceIdleTimeout.
$OldestDriver = 580
$OldestWsl = [version] '2.5.10'
# In GB: what Windows must have, what WSL gets at least (the server needs some 10 GB while it loads), what is enough without swap.
$LeastMemory = 15
$LeastForWsl = 12
$AmpleForWsl = 16
# In GB, for image and weights: preflight_disk_free.
$LeastDisk = 70
if (-not $Repository) { $Repository = 'https://git.example.org/dots-ocr/deploy' }
if ($Repository -notmatch '^[A-Za-z0-9:/@._~+-]+$') { throw "'$Repository' is no address to clone from. Fix: give one by -Repository." }
$Checkout = '/opt/dots-ocr-deploy'
$Wsl = Join-Path $env:SystemRoot 'System32\wsl.exe'
# Otherwise wsl.exe writes UTF-16, which Windows PowerShell reads as text with a NUL after every letter.
$env:WSL_UTF8 = '1'

function Stop-WithFix {
    param([string] $Cause, [string] $Fix)
    throw "$Cause. Fix: $Fix."
}

function Invoke-Wsl {
    # Runs wsl.exe and returns its lines; the exit status is in $LASTEXITCODE.
    param([string[]] $Arguments)
    $before = $ErrorActionPreference
    # What a program writes to its error stream must not end the script.
    $ErrorActionPreference = 'Continue'
    try {
        & $Wsl @Arguments 2>&1 | ForEach-Object { ([string] $_).Replace("`0", '').Trim() } | Where-Object { $_ -ne '' }
    } finally {
        $ErrorActionPreference = $before
    }
}

function Invoke-Script {
    # Runs a shell script as root inside, and shows its output as it comes. Quotes would not survive the way there, so it goes in
    # base64, and into a file, because what it starts may read standard input.
    param([string] $Name, [string] $Script)
    $encoded = [Convert]::ToBase64String([System.Text.Encoding]::UTF8.GetBytes($Script.Replace("`r`n", "`n")))
    $file = "/run/dots-ocr-$Name.sh"
    & $Wsl -d $Distribution -u root --exec sh -c "echo $encoded | base64 -d >$file && exec sh $file" | Out-Host
}

function Get-MemorySetting {
    # What .wslconfig gets besides what was given: a PC of 16 GB would give WSL 8 GB, in which the server does not load.
    param([string] $Text)
    $keys = [ordered] @{}
    $total = [math]::Round((Get-CimInstance Win32_ComputerSystem).TotalPhysicalMemory / [math]::Pow(2, 30))
    if ($total -lt $LeastMemory) {
        Stop-WithFix "This PC has $total GB of memory, and the server needs 16 GB" 'add memory'
    }
    $given = $Memory
    if ($given -eq '' -and $Text -notmatch '(?im)^\s*memory\s*=' -and $total / 2 -lt $LeastForWsl) { $given = "${LeastForWsl}GB" }
    if ($given -ne '') { $keys['memory'] = $given }
    if ($Swap -ne '') {
        $keys['swap'] = $Swap
    } elseif ($Text -notmatch '(?im)^\s*swap\s*=' -and $total / 2 -lt $AmpleForWsl) {
        $keys['swap'] = '8GB'
    }
    return $keys
}

function Test-Driver {
    $smi = Join-Path $env:SystemRoot 'System32\nvidia-smi.exe'
    if (-not (Test-Path -LiteralPath $smi)) {
        Stop-WithFix "There is no NVIDIA driver in Windows" "install NVIDIA's driver for Windows, branch $OldestDriver or newer"
    }
    $answer = @(& $smi '--query-gpu=name,driver_version' '--format=csv,noheader')
    if ($LASTEXITCODE -ne 0 -or $answer.Count -eq 0) {
        Stop-WithFix "NVIDIA's driver shows no GPU ($answer)" "reinstall NVIDIA's driver for Windows, and restart"
    }
    $driver = ($answer[0] -split ',')[-1].Trim()
    if ([int] ($driver -split '\.')[0] -lt $OldestDriver) {
        Stop-WithFix "NVIDIA's driver is $driver" "install a newer one in Windows, branch $OldestDriver or newer"
    }
    Write-Host "GPU: $($answer -join '; ')"
}

function Get-WslVersion {
    # The first number of 'wsl --version' that looks like one of WSL; its words are in the language of Windows.
    $lines = @(Invoke-Wsl '--version')
    if ($LASTEXITCODE -ne 0) { return $null }
    foreach ($line in $lines) {
        if ($line -match '(\d+\.\d+\.\d+)') { return [version] $Matches[1] }
    }
    return $null
}

function Update-Wsl {
    $version = Get-WslVersion
    if ($null -ne $version -and $version -ge $OldestWsl) {
        Write-Host "WSL: $version"
        return
    }
    if ($null -eq $version) {
        if (-not $PSCmdlet.ShouldProcess('WSL', 'install')) { return }
        & $Wsl --install --no-distribution | Out-Host
    } else {
        if (-not $PSCmdlet.ShouldProcess('WSL', "update from $version")) { return }
        & $Wsl --update | Out-Host
    }
    $version = Get-WslVersion
    if ($null -eq $version -or $version -lt $OldestWsl) {
        Stop-WithFix "WSL is '$version' now, $OldestWsl or newer is needed" `
            "restart Windows and run this again; if that does not help: 'wsl --update --web-download' as administrator"
    }
}

function Install-Distribution {
    $names = @(Invoke-Wsl @('--list', '--quiet'))
    if ($LASTEXITCODE -eq 0 -and $names -contains $Distribution) {
        Write-Host "Distribution: $Distribution"
        return $true
    }
    # The preflight inside sees WSL's virtual disk alone, which claims a terabyte.
    $free = [math]::Floor((Get-Item -LiteralPath $env:LOCALAPPDATA).PSDrive.Free / [math]::Pow(2, 30))
    if ($free -lt $LeastDisk) {
        Stop-WithFix "$free GB are free on the drive of $env:LOCALAPPDATA, and the server needs $LeastDisk GB" `
            'free some space there, then run this again'
    }
    if (-not $PSCmdlet.ShouldProcess($Distribution, 'install')) { return $false }
    # Its first start, which asks for a name and a password for Linux, is left to you.
    & $Wsl --install --distribution $Distribution --no-launch | Out-Host
    if ($LASTEXITCODE -ne 0) {
        Stop-WithFix "$Distribution was not installed" `
            "switch virtualization on in the firmware, restart if Windows asks for it, then run this again"
    }
    return $true
}

function Merge-Setting {
    # Returns a file's text with keys set in a section; all else stays, line ends included.
    param([string] $Text, [string] $Section, [System.Collections.IDictionary] $Keys, [string] $NewLine)
    $lines = New-Object 'System.Collections.Generic.List[string]'
    if ($Text -ne '') { $lines.AddRange([string[]] ($Text -split '\r?\n')) }
    $ends = $lines.Count -eq 0 -or $lines[$lines.Count - 1] -eq ''
    if ($lines.Count -gt 0 -and $ends) { $lines.RemoveAt($lines.Count - 1) }
    foreach ($key in $Keys.Keys) {
        $value = $Keys[$key]
        $inside = $false
        $found = $false
        $last = -1
        for ($number = 0; $number -lt $lines.Count; $number++) {
            if ($lines[$number] -match '^\s*\[([^\]]*)\]') {
                $inside = $Matches[1].Trim() -eq $Section
                if ($inside) { $last = $number }
            } elseif ($inside -and $lines[$number].Trim() -ne '') {
                $last = $number
                if ($lines[$number] -match "^(\s*$([regex]::Escape($key))\s*=[ \t]*)([^#]*?)(\s*(?:#.*)?)$") {
                    $lines[$number] = $Matches[1] + $value + $Matches[3]
                    $found = $true
                }
            }
        }
        if ($found) { continue }
        if ($last -lt 0) {
            if ($lines.Count -gt 0 -and $lines[$lines.Count - 1].Trim() -ne '') { $lines.Add('') }
            $lines.Add("[$Section]")
            $last = $lines.Count - 1
        }
        $lines.Insert($last + 1, "$key=$value")
    }
    $result = $lines -join $NewLine
    if ($ends -and $lines.Count -gt 0) { $result += $NewLine }
    return $result
}

function Set-WslConfig {
    $path = Join-Path $env:USERPROFILE '.wslconfig'
    $before = ''
    # UTF-8, with or without its mark, as it was; Windows PowerShell's own commands would add one.
    $encoding = New-Object System.Text.UTF8Encoding $false
    if (Test-Path -LiteralPath $path) {
        $bytes = [System.IO.File]::ReadAllBytes($path)
        if ($bytes.Length -ge 2 -and (($bytes[0] -eq 0xFF -and $bytes[1] -eq 0xFE) -or ($bytes[0] -eq 0xFE -and $bytes[1] -eq 0xFF))) {
            Stop-WithFix "$path is in UTF-16" "save it as UTF-8 in an editor, then run this again"
        }
        if ($bytes.Length -ge 3 -and $bytes[0] -eq 0xEF -and $bytes[1] -eq 0xBB -and $bytes[2] -eq 0xBF) {
            $encoding = New-Object System.Text.UTF8Encoding $true
        }
        $before = [System.IO.File]::ReadAllText($path, $encoding)
    }
    $newLine = "`r`n"
    if ($before -ne '' -and $before -notmatch "`r`n") { $newLine = "`n" }
    $keys = Get-MemorySetting $before
    $keys['vmIdleTimeout'] = '-1'
    $after = Merge-Setting $before 'general' ([ordered] @{ instanceIdleTimeout = '-1' }) $newLine
    $after = Merge-Setting $after 'wsl2' $keys $newLine
    if ($after -ceq $before) { return $false }
    if (-not $PSCmdlet.ShouldProcess($path, "set $((@('instanceIdleTimeout') + @($keys.Keys)) -join ', ')")) { return $false }
    $backup = "$path.before-dots-ocr"
    if ((Test-Path -LiteralPath $path) -and -not (Test-Path -LiteralPath $backup)) { Copy-Item -LiteralPath $path -Destination $backup }
    [System.IO.File]::WriteAllText($path, $after, $encoding)
    return $true
}

function Enable-Systemd {
    $conf = @(Invoke-Wsl @('-d', $Distribution, '-u', 'root', '--exec', 'cat', '/etc/wsl.conf'))
    $section = ''
    foreach ($line in $conf) {
        if ($line -match '^\s*\[([^\]]*)\]') { $section = $Matches[1].Trim() }
        elseif ($section -eq 'boot' -and $line -match '^\s*systemd\s*=\s*true\b') { return $false }
    }
    if (-not $PSCmdlet.ShouldProcess("$Distribution, /etc/wsl.conf", 'enable systemd')) { return $false }
    $script = @'
set -eu
touch /etc/wsl.conf
sed -i -E '/^[[:space:]]*\[[Bb]oot\]/,/^[[:space:]]*\[/{/^[[:space:]]*[Ss]ystemd[[:space:]]*=/d}' /etc/wsl.conf
if grep -qiE '^[[:space:]]*\[boot\]' /etc/wsl.conf; then
  sed -i -E '0,/^[[:space:]]*\[[Bb]oot\].*/s//&\nsystemd=true/' /etc/wsl.conf
else
  printf '\n[boot]\nsystemd=true\n' >> /etc/wsl.conf
fi
if ! [ -x /sbin/init ] || ! [ -e /lib/systemd/systemd ]; then
  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends systemd systemd-sysv
fi
'@
    Invoke-Script 'systemd' $script
    if ($LASTEXITCODE -ne 0) {
        Stop-WithFix "/etc/wsl.conf of $Distribution was not changed" "put systemd=true below [boot] there by hand"
    }
    return $true
}

function Register-Start {
    # The same task as the Ansible role's, for this user alone: one for all users takes an administrator.
    $name = "dots-ocr-$Distribution"
    $arguments = "-d $Distribution -u root --exec /bin/true"
    $task = Get-ScheduledTask -TaskName $name -ErrorAction SilentlyContinue
    if ($null -ne $task -and $task.Actions[0].Execute -eq $Wsl -and $task.Actions[0].Arguments -eq $arguments) { return }
    if (-not $PSCmdlet.ShouldProcess($name, 'register a task that starts the distribution at your logon')) { return }
    $user = "$env:USERDOMAIN\$env:USERNAME"
    $options = @{
        TaskName  = $name
        Action    = New-ScheduledTaskAction -Execute $Wsl -Argument $arguments
        Trigger   = New-ScheduledTaskTrigger -AtLogOn -User $user
        Principal = New-ScheduledTaskPrincipal -UserId $user -LogonType Interactive -RunLevel Limited
        Settings  = New-ScheduledTaskSettingsSet -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries
        Force     = $true
    }
    Register-ScheduledTask @options | Out-Null
}

function Restart-Wsl {
    # .wslconfig is read when WSL starts. Other distributions of yours are not ended without your word.
    $others = @(Invoke-Wsl @('--list', '--running', '--quiet') | Where-Object { $_ -ne $Distribution })
    if ($LASTEXITCODE -eq 0 -and $others.Count -gt 0) {
        Stop-WithFix "The new settings need a restart of WSL, and these distributions run: $($others -join ', ')" `
            "save your work in them, type 'wsl --shutdown', then run this again"
    }
    if ($PSCmdlet.ShouldProcess('WSL', 'shut down, so that the new settings count')) { & $Wsl --shutdown | Out-Host }
}

function Install-Server {
    $script = @'
set -eu
export DEBIAN_FRONTEND=noninteractive
for program in git make python3; do
  command -v $program >/dev/null || missing=yes
done
if [ -n "${missing:-}" ] || ! python3 -c 'import ensurepip' 2>/dev/null; then
  apt-get -q update
  apt-get -q install --yes --no-install-recommends ca-certificates git make python3 python3-venv
fi
if [ -d CHECKOUT/.git ]; then
  git -C CHECKOUT pull --ff-only
else
  git clone REPOSITORY CHECKOUT
fi
exec make -C CHECKOUT deploy
'@
    $what = "clone $Repository, and deploy the server, which takes up to an hour the first time"
    if (-not $PSCmdlet.ShouldProcess($Distribution, $what)) { return }
    $script = $script.Replace('CHECKOUT', $Checkout).Replace('REPOSITORY', $Repository)
    Invoke-Script 'deploy' $script
    if ($LASTEXITCODE -ne 0) {
        Stop-WithFix 'The deployment stopped' 'do what its last lines say, then run this again'
    }
    Write-Host ''
    Write-Host 'The server reads at http://localhost:8000. Read a sample, then your own; C:\scans\page.png is /mnt/c/scans/page.png inside:'
    Write-Host "  wsl -d $Distribution -u root --cd $Checkout .venv/bin/dots-ocr read roles/dots_ocr_server/files/golden/page.png"
}

if (-not (Test-Path -LiteralPath $Wsl)) {
    Stop-WithFix 'This Windows has no WSL' 'use Windows 11, or Windows 10 22H2, up to date'
}
Test-Driver
Update-Wsl
$present = Install-Distribution
$changed = Set-WslConfig
if ($present) { $changed = (Enable-Systemd) -or $changed }
if (-not $NoLogonTask) { Register-Start }
if ($changed) { Restart-Wsl }
if (-not $NoDeploy) { Install-Server }

if ($WhatIfPreference) {
    Write-Host 'Nothing was changed. Run it again without -WhatIf.'
} elseif ($NoDeploy) {
    Write-Host 'Windows is ready. Deploy the server with:'
    Write-Host "  wsl -d $Distribution -u root git clone $Repository $Checkout"
    Write-Host "  wsl -d $Distribution -u root make -C $Checkout deploy"
}
